"""The task of `edgekd vl train`: a small vision-language student with CLIP-TD-style token distillation."""
