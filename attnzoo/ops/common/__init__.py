"""What operations share: choosing an implementation, masks, launches, blocks of rows, costs."""
