"""What a run says while it goes on: log, progress bar, trackers, page, device."""
