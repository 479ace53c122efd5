"""Text, Markdown, HTML and SVG; nothing here knows what it prints."""
