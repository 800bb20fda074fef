"""Every method there is, behind the `Scorer` protocol."""
