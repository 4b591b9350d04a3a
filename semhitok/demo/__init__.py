"""The demos and their toy world: photographs, generated pictures, small teachers."""
