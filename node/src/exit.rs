//! How the program ends: 0 all well, 1 something went wrong, 2 it was asked for something impossible.

use std::process::ExitCode;

/// Something is wrong with the command line, the environment or a configuration file: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Exit code of [`UsageError`]; clap ends with the same one.
const USAGE: u8 = 2;

/// Shows an error on standard error and says which exit code it means.
pub fn code_of(result: anyhow::Result<ExitCode>) -> ExitCode {
    let error = match result {
        Ok(code) => return code,
        Err(error) => error,
    };
    // Whoever reads our output has gone (`ingle status | head -1`): nobody is left to be told.
    if error.chain().any(is_broken_pipe) {
        return ExitCode::SUCCESS;
    }
    crate::output::complain(&format!("error: {error:#}"));
    ExitCode::from(number_of(&error))
}

fn number_of(error: &anyhow::Error) -> u8 {
    if error.is::<UsageError>() { USAGE } else { 1 }
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<crate::output::OutputClosed>().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_errors_are_two_and_all_others_one() {
        assert_eq!(number_of(&UsageError("no".into()).into()), 2);
        assert_eq!(number_of(&anyhow::anyhow!("no")), 1);
        let wrapped = anyhow::Error::from(crate::output::OutputClosed).context("writing");
        assert!(wrapped.chain().any(is_broken_pipe));
    }
}
