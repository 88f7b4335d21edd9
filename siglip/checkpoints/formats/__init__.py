"""Released formats: names, layouts and configs of other projects."""
