"""Looking at what ids mean: one image under one or two tokenizers, patch by patch, on a local page."""
