"""What was visible when: the point-in-time join, per-user sequences and the audit that proves them."""
