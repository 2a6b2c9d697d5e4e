"""Teachers, students, their weights, and layers that train faster."""
