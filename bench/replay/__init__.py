"""Published traces against running servers."""
