"""Studies: recipes compared over seeds and unseen domains or classes, cell by cell, with one table at the end."""
