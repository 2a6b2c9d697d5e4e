"""Small vision-language students: tasks, data, the joint student, and CLIP-TD-style token distillation."""
