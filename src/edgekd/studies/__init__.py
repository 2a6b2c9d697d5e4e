"""Studies: recipes compared over seeds and unseen domains or classes, cell by cell, with an honest table at the end."""
