"""Objectives, solvers and guidance: what is predicted of a noised image, and how one is drawn from predictions."""
