"""The frozen language model, its adapters, and how items are read fast."""
