"""What every experiment needs: argument checks, statistics, reports, accounting, training loops."""
