//! `quarry config`: checks a file, or prints one to start from.

use quarry_config::Config;
use serde::Serialize;

use super::Failure;
use super::args::ConfigCommand;
use super::output::Console;

#[derive(Serialize)]
struct Checked {
    file: String,
    valid: bool,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Example {
    example: String,
}

pub(super) fn run(command: ConfigCommand, console: &mut Console<'_>) -> Result<(), Failure> {
    match command {
        ConfigCommand::Check { file } => {
            let notes = Config::load(&file)?.notes();
            let checked = Checked {
                file: file.display().to_string(),
                valid: true,
                notes,
            };
            console.show(&checked, |checked| {
                let notes: String = checked
                    .notes
                    .iter()
                    .map(|note| format!("note: {note}\n"))
                    .collect();
                format!("{} is valid\n{notes}", checked.file)
            })
        }
        ConfigCommand::Example => console.show(
            &Example {
                example: Config::example(),
            },
            |e| e.example.clone(),
        ),
    }
}
