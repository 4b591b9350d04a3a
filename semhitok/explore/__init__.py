"""What the ids of an image mean, patch by patch, for one or two tokenizers, on a local page."""
