// Command lines: the option groups that commands share, and how they are parsed.
#pragma once

#include <boost/program_options.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace stream_cqsa {

using Arguments = std::vector<std::string>;
using OptionGroup = boost::program_options::options_description;

/// Where Q, K and V come from.
struct InputOptions {
  std::string input;                             ///< one file of three tensors, or synthetic:SEED
  std::string query, key, value;                 ///< or three files
  std::string query_name, key_name, value_name;  ///< tensors in .safetensors files
  std::string layout;
  std::string direct_io;        ///< auto, yes or no; empty: auto
  std::string shape, dtype;     ///< of a synthetic input
  std::int64_t kv_heads = 0;    ///< of a synthetic input, 0: as many as query heads
  std::int64_t key_length = 0;  ///< of a synthetic input, 0: as long as the query
};

/// What attention is computed of them.
struct AttentionOptions {
  bool causal = false;
  std::optional<double> scale;
  std::string output_dtype;
  std::optional<std::string> queries;  ///< BEGIN:END, the rows of Q that are computed; else all
};

/// What it may use.
struct ResourceOptions {
  std::string backend;
  std::string device_memory, host_memory;
  std::string scratch;
  bool assume_scratch = false;                  ///< plan as if it were given
  std::string division;                         ///< cqs, tiles or auto; empty: cqs
  std::optional<std::int64_t> chunks;           ///< of cqs, else chosen
  std::string grid;                             ///< of tiles, ROWSxCOLUMNS; empty: chosen
  std::optional<std::int64_t> heads_per_group;  ///< else chosen
  int threads = 0;                              ///< 0: one per core
  int cuda_device = 0;                          ///< of this rank
  std::string plan;                             ///< file written by plan --json
  int mergers = 0;                              ///< ranks that merge beside the master
  int ranks_on_host = 1;                        ///< of this run, which share its memory
  int workers_on_host = 1;                      ///< which share its cores
  std::string checkpoint;                       ///< directory; accumulators then stay on the host
};

/// When checkpoints are made, and when the run stops for one.
struct CheckpointTimes {
  std::optional<double> interval;   ///< seconds
  std::optional<double> max_hours;  ///< from the start
};

struct OutputOptions {
  std::string output, lse;
  bool overwrite = false;
};

/// All of what `run` and `plan` take alike.
struct JobOptions {
  InputOptions input;
  AttentionOptions attention;
  ResourceOptions resources;
  OutputOptions output;
  CheckpointTimes checkpoint;
  bool input_through_master = false;  ///< rank 0 alone opens the inputs
};

OptionGroup input_group(InputOptions& options);
OptionGroup synthetic_group(InputOptions& options);
OptionGroup attention_group(AttentionOptions& options);
OptionGroup resource_group(ResourceOptions& options);
OptionGroup ranks_group(ResourceOptions& options);
OptionGroup output_group(OutputOptions& options);
OptionGroup checkpoint_group(std::string& directory, CheckpointTimes& times);
/// The groups of a job, in one.
OptionGroup job_group(JobOptions& options);

/// Parses `arguments`. Returns false when --help was asked for and printed: `intro`, then the
/// options. Throws InputError with one line for an unknown option or a bad value.
bool parse(const Arguments& arguments, const std::string& intro, OptionGroup options);

/// Prints version, commit, build, backends and MPI library.
int print_version();

}  // namespace stream_cqsa
