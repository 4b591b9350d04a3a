"""The demos, and what they need: photographs, generated pictures, a small teacher."""
