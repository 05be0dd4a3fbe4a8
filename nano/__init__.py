"""The nano model: a small DeepSeek-V4 trained from scratch on one public domain book."""
