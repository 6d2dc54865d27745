"""The table of the demo model: unseen people in eight emotions, beside the truth."""
