"""How work is split over processes: one file per dimension."""
