"""The task of `edgekd train`: an image classifier distilled from a teacher, from its settings to the finished run."""
