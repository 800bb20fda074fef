"""``python -m metarec.cli``."""

from metarec.cli import main

main()
