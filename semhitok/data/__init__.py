"""What goes in and out as files: images and ids."""
