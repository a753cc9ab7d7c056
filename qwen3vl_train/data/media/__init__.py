"""Bytes and file headers -> sizes, pixels and patches of images and clips."""
