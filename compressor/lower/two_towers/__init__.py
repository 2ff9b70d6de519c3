"""The files of the towers of a model of images and texts."""
