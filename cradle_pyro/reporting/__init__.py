"""What users see: AnnData, ArviZ, plots, tables and the report; nothing here is computed anew."""
