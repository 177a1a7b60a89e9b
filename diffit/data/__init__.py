"""Sets of pictures: their files, in EDM's layout."""
