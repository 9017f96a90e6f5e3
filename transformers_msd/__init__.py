"""Lossless speculative decoding for vision-language models."""
