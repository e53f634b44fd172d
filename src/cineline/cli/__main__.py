from cineline.cli import main

main()
