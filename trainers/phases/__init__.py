"""One file a training phase."""
