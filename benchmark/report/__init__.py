"""The benchmark's report: one `Report`, its sections, and the console, Markdown, HTML and JSON written from them."""
