"""The page kit of all reports: text, tables, plots, galleries, HTML; it knows no job."""
