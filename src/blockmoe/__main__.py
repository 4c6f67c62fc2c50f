from blockmoe.cli import main

main()
