"""What runs the project somewhere: job submission, images and clusters."""
