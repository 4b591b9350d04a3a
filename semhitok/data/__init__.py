"""Images: reading, cropping, webdataset shards; the stream of training data."""
