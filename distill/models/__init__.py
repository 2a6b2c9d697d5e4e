"""The networks of a training: teachers, students, their weights, and layers that train faster."""
