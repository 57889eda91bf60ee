"""Has the traffic changed? References, online tests against them, and thresholds that keep a promised run length."""
