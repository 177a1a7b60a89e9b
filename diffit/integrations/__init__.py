"""The fused operators inside networks of other libraries, which are not imported here."""
