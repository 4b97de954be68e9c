"""Files of rows, whatever their format: what lies in a folder, and how each is read."""
