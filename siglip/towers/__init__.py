"""The image and text towers."""
