// The kernels of PTX files.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernel_reader.h"

namespace emulator {

// By name, each read when it is first asked for.
class Program {
 public:
  void add(const std::string& source) {
    auto module = std::make_unique<Module>();
    std::string& text = module->text;
    for (size_t p = 0; p < source.size();) {  // without comments
      const size_t comment = std::min(source.find("//", p), source.size());
      text.append(source, p, comment - p);
      p = std::min(source.find('\n', comment), source.size());
    }
    for (const char* start : {"\n.shared", "\n.extern .shared"})
      for (size_t p = text.find(start); p != std::string::npos; p = text.find(start, p + 1))
        read_shared_variable(trimmed(text.substr(p, text.find(';', p) - p)), module->shared);
    for (size_t p = text.find(".entry"); p != std::string::npos; p = text.find(".entry", p + 1))
      entries_[trimmed(text.substr(p + 6, text.find('(', p) - p - 6))] = {module.get(), p + 6};
    modules_.push_back(std::move(module));
  }

  const Kernel& kernel(const std::string& name) {
    std::unique_ptr<Kernel>& kernel = kernels_[name];
    if (!kernel) {
      const auto found = entries_.find(name);
      if (found == entries_.end()) fail("no PTX of %s", name.c_str());
      const auto& [module, place] = found->second;
      const size_t end = module->text.find(".entry", place);
      kernel = KernelReader(module->text.substr(place, end - place), module->shared).take();
    }
    return *kernel;
  }

 private:
  struct Module {
    std::string text;
    SharedVariables shared;
  };
  std::vector<std::unique_ptr<Module>> modules_;
  std::map<std::string, std::pair<const Module*, size_t>> entries_;
  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
};

}  // namespace emulator
