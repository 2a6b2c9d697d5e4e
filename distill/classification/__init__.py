"""The task of `edgekd train`: distil an image classifier from a teacher."""
