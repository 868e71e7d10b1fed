"""Lists of kernel calls on shares: as data (`calls`), run by one party (`running`), with what that needs (`needs`)."""
