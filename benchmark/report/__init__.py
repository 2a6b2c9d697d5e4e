"""Render a `Report`: its sections, and their output on the console and as Markdown, HTML and JSON."""
