"""What placements would have been worth on load that was recorded."""
