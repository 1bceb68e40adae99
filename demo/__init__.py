"""A demo model: procedural clips, its training and the judge of what it renders."""
