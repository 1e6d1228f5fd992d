"""Pages for people, made of what the evaluation found."""
