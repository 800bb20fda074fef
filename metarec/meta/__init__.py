"""Inner and outer loops over plain tensors; nothing here knows text or ratings."""
