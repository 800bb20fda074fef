"""Meta-training on a task: fitting the score, going on from an old run, tuning."""
