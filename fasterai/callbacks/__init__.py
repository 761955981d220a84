"""One file for each training framework, which translates its events and knows no method."""
