"""Pages for people, in a browser: the demo and the human evaluation."""
